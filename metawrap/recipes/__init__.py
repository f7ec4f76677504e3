"""Published experiments as YAML files, one each, and their way to the settings of a run.

file -> mapping with the line of each key (`yaml_file`) -> typed fields (`fields`) -> extended recipes -> `Recipe`.
From top to bottom; a module imports those below it alone: display -> recipe -> fields -> yaml_file.
"""

from metawrap.recipes.display import recipe_table, recipe_text
from metawrap.recipes.recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names", "recipe_table", "recipe_text"]
