"""p(x, z): what is in the world."""
