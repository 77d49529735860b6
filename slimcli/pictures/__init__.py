"""Pictures of slimming: the life of every patch over the image, and what is left after each drop layer.

Everything is drawn on the tensor that the model takes, so whatever crops, squashes or pads an image on its way in,
the overlay sits on the pixels that each patch covers.
"""

from slimcli.pictures.album import Album, Picking, check_files, open_album
from slimcli.pictures.drawing import Style, draw_sheets
from slimcli.pictures.explore import look_closely, page_of
from slimcli.pictures.figure import draw, draw_lives, fit, panel_titles
from slimcli.pictures.files import FORMATS, PAGE, ROWS_A_FILE, TILES_A_FILE, choose_format, encode, sheets, write_sheet
from slimcli.pictures.geometry import MOST_STAGES, Geometry, drop_stages, find_geometry
from slimcli.pictures.outcome import PICKS, Guess, Outcome, counted, describe, look, pick
from slimcli.pictures.pixels import COLOURS, Pixels, kept, life_map, panels, picture, strip
from slimcli.pictures.sources import data_batches, draw_at_random, find_images, image_batches
from slimcli.pictures.words import class_name, fit_words, readable, short_name, verdict

__all__ = [
    "COLOURS",
    "FORMATS",
    "MOST_STAGES",
    "PAGE",
    "PICKS",
    "ROWS_A_FILE",
    "TILES_A_FILE",
    "Album",
    "Geometry",
    "Guess",
    "Outcome",
    "Picking",
    "Pixels",
    "Style",
    "check_files",
    "choose_format",
    "class_name",
    "counted",
    "data_batches",
    "describe",
    "draw",
    "draw_at_random",
    "draw_lives",
    "draw_sheets",
    "drop_stages",
    "encode",
    "find_geometry",
    "find_images",
    "fit",
    "fit_words",
    "image_batches",
    "kept",
    "life_map",
    "look",
    "look_closely",
    "open_album",
    "page_of",
    "panel_titles",
    "panels",
    "pick",
    "picture",
    "readable",
    "sheets",
    "short_name",
    "strip",
    "verdict",
    "write_sheet",
]
