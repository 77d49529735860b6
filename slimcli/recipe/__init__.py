"""Recipes: the `schema`, [data] in `data`, the `values` of fields, how a file is read (`text`, `read`) and `errors`."""

from slimcli.recipe.read import FILES as FILES
from slimcli.recipe.read import apply_override as apply_override
from slimcli.recipe.read import builtin_recipes as builtin_recipes
from slimcli.recipe.read import find_recipe as find_recipe
from slimcli.recipe.read import load_recipe as load_recipe
from slimcli.recipe.read import read_recipe as read_recipe
from slimcli.recipe.read import require_files as require_files
from slimcli.recipe.read import summary_lines as summary_lines
from slimcli.recipe.read import validate as validate
from slimcli.recipe.schema import AugmentationSection as AugmentationSection
from slimcli.recipe.schema import DataSection as DataSection
from slimcli.recipe.schema import ModelSection as ModelSection
from slimcli.recipe.schema import OptimizerSection as OptimizerSection
from slimcli.recipe.schema import Recipe as Recipe
from slimcli.recipe.schema import SlimmingSection as SlimmingSection
from slimcli.recipe.schema import StageSection as StageSection
