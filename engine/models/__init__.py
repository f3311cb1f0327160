"""Two small language models that come with the package, the text they learnt from, and the script that trained them."""
