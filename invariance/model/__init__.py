"""A model as spaces and weights: its family, its layout, its canonical form, changes of basis, the certificate."""
