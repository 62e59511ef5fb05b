"""The embedded world: real handwritten digits in colour on two-tone textures, with captions that say what is there.

Images, captions, tokenizer and judge; no job is in it.
"""
