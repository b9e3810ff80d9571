"""The classifier and the parts that all networks share. Exports nothing: Keras is loaded where a network is used."""
