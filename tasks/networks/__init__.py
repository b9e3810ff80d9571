"""The classifier and what all networks need. Exports nothing: Keras is loaded where a network is used."""
