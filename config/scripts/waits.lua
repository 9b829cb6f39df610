-- Notes whether a running attempt waits for its turn, by the holder of the newest token: a worker that dies meanwhile did
-- not die of it.
--
-- KEYS: 1 record (hash)
-- ARGV: 1 token, 2 whether it waits (0 or 1)
local state, token, attempt = unpack(redis.call("HMGET", KEYS[1], "state", "token", "attempts"))
if state == "RUNNING" and token == ARGV[1] then
  if ARGV[2] == "1" then
    redis.call("HSET", KEYS[1], "waits", attempt)
  else
    redis.call("HDEL", KEYS[1], "waits")
  end
end
