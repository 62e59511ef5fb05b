"""Networks only: nothing in this package knows of losses, files or meshes."""
