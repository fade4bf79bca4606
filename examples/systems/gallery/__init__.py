"""What the systems of this folder share: pictures, words, and how they are trained and judged."""
