"""TFDS builders, one file each; they write array_record, which is read without TensorFlow."""
