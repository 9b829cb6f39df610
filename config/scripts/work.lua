-- Adds to what each kind of job takes of a worker's time, as an average over about the last fifty: older ones fade.
--
-- KEYS: 1 work (hash)
-- ARGV: for each kind: its name, how many jobs, the sum of their weights, the sum of their seconds times their weights
for i = 1, #ARGV, 4 do
  local kind, fading = ARGV[i], 0.98 ^ tonumber(ARGV[i + 1])
  local known = redis.call("HGET", KEYS[1], kind)
  -- Kinds are few. Should callers find a way to make many, the first thousand stay.
  if known or redis.call("HLEN", KEYS[1]) < 1000 then
    local weights, seconds = 0, 0
    if known then
      weights, seconds = string.match(known, "^(%S+) (%S+)$")
    end
    weights = (tonumber(weights) or 0) * fading + ARGV[i + 2]
    seconds = (tonumber(seconds) or 0) * fading + ARGV[i + 3]
    redis.call("HSET", KEYS[1], kind, string.format("%.9g %.9g", weights, seconds))
  end
end
