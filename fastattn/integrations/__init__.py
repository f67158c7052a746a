"""Front-ends for frameworks, one module each; importing fastattn imports none of them."""
