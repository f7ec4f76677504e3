"""Published experiments as YAML files, one each, and how such a file becomes the settings of a run.

file -> mapping with the line of each key (`yaml_file`) -> typed fields (`fields`) -> what it extends -> `Recipe`.
"""

from metawrap.recipes.recipe import Recipe, load_recipe, recipe_names
from metawrap.recipes.showing import recipe_table, recipe_text

__all__ = ["Recipe", "load_recipe", "recipe_names", "recipe_table", "recipe_text"]
