"""The same echo and the same fan-out as other projects' users write them."""
