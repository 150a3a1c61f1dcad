"""Images: decoding, the cache of decoded ones, stain, and what is wrong with files."""
