"""Recipes, a YAML file each: packaged, so that an installed genkit has them too."""
