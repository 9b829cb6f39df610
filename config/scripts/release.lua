-- Has what is kept of an answered job expire sooner, once whoever asked has the answer elsewhere. What does not expire is
-- not kept for him.
--
-- KEYS: what is kept of it
-- ARGV: 1 seconds
for _, key in ipairs(KEYS) do
  if redis.call("TTL", key) > tonumber(ARGV[1]) then
    redis.call("EXPIRE", key, ARGV[1])
  end
end
