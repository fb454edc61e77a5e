"""A small teacher for feature alignment, trained on the images themselves and without labels: DINO with patch tokens.

A student network sees several distorted views of an image and predicts what a teacher, its own moving average, makes
of others of them (arXiv 2104.14294); where patches of a view are masked, it predicts the teacher's tokens of them
(arXiv 2111.07832). Both predictions are distributions over learned prototypes, and Sinkhorn-Knopp keeps the teacher's
evenly spread, so that it cannot collapse (DINOv2, arXiv 2304.07193).
"""
