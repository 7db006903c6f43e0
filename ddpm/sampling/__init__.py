"""From weights and image numbers to images, and to files of images."""
