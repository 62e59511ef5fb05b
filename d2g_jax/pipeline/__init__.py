"""A diffusers folder as one object and back: its weights, a hub's files, prompts as conditions, drawing."""
