"""The whole method of the paper: searches at two lengths, fine-tuning at each, a second search, a ladder of regimes."""
