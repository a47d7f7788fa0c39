"""Drawing, from result tables only. `style` holds what all figures share."""
