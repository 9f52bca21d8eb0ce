"""Messages that load generator and served variant exchange through their socket."""

from __future__ import annotations

import struct

#: A query: LoadGen's number of it, and which sequence it asks about.
QUERY = struct.Struct("<QQ")
#: An answer: the number of the query.
ANSWER = struct.Struct("<Q")
