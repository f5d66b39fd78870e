"""From preference rows of any format to token ids."""
