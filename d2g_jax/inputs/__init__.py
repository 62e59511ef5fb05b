"""What others bring, read and checked in one place a kind: text, images, arrays, numbers, places.

Every job goes through these; docs/inputs.md lists what is read and what is refused. Nothing here knows of networks.
"""
