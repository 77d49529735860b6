"""The only room that knows a model library: adapters that tell slim how to run a model block by block."""
