"""One delivery, from the broker's handover to its acknowledgement."""
