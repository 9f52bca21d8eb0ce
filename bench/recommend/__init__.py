"""From a run to advice: which variant to ship, how sure that is, and what it costs.

Reads runs through `bench.records.reader` alone and measures nothing, but for the proof of an artefact that it wrote.
The door for other rooms is `bench.recommend.words.sentences`.
"""
