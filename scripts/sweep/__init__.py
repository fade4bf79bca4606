"""The sweep over every model class of transformers, timm and open_clip: built tiny, run plain and accelerated."""
