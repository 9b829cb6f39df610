-- Part of a list of messages, without those that are too large to be sent: in their places there is nothing.
--
-- KEYS: 1 the queue's list
-- ARGV: 1 index of the first, 2 index of the last, 3 the most bytes that one may have
local messages = redis.call("LRANGE", KEYS[1], ARGV[1], ARGV[2])
for index, message in ipairs(messages) do
  if #message > tonumber(ARGV[3]) then
    messages[index] = false
  end
end
return messages
