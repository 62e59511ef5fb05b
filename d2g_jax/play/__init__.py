"""`d2g play`: a local page that draws as one types and drags the noise.

pad.py what a place on the pad means, studio.py the compiled model, server.py and page.html the page.
"""
