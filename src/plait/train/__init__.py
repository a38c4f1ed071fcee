"""Training: trees to packed rows, a small decoder, supervised fine-tuning. The only place that needs torch."""
