"""Section 5 and appendix E of the paper, exactly: small distributions, float64, no sampling."""
