-- Whose turn it is to look for overdue leases, and what time it is. The turn ends by itself; one that would last for longer
-- than it is given was taken before the server's clock was set back, and does not count.
--
-- KEYS: 1 the turn (string)
-- ARGV: 1 worker, 2 milliseconds that a turn lasts
-- Returns {1 where it is this worker's, else 0, now}
local left = redis.call("PTTL", KEYS[1])
local is_ours = left < 0 or left > tonumber(ARGV[2])
if is_ours then
  redis.call("SET", KEYS[1], ARGV[1], "PX", ARGV[2])
end
return { is_ours and 1 or 0, string.format("%.6f", clock()) }
