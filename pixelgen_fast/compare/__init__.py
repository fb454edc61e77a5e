"""Several systems on the same images and seeds, and a page that sets their results beside each other."""
