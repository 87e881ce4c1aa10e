"""AlpacaEval 2: weighted preferences over a reference, raw and length-controlled."""
