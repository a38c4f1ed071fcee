"""Models and tokenizers of Hugging Face in Plait's trainers."""
