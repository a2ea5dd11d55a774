"""The local page of `dinat-triton explore`: a server on loopback, and the page it serves."""
