"""How long each stage of a bundle takes here, beside other ways to compute the same."""
