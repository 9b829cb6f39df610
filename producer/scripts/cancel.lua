-- Cancels a queued job for good; asks the worker of a running one to stop.
--
-- KEYS[1]  the job's record (hash)
-- KEYS[2]  the job's events (stream)
-- KEYS[3]  the idempotency key's entry (string), absent for a job without one
-- ARGV[1]  outcome: JSON of a JobFailure with the code CANCELLED
-- ARGV[2]  seconds that an ended job can be read
-- Returns the state the job was found in, nil when there is no such job.
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'RUNNING' then
  redis.call('HSET', KEYS[1], 'cancel_requested', '1')
elseif state == 'QUEUED' then
  local time = redis.call('TIME')
  local now = string.format('%d.%06d', time[1], time[2])
  redis.call('HSET', KEYS[1], 'state', 'CANCELLED', 'outcome', ARGV[1], 'ended_at', now)
  redis.call('XADD', KEYS[2], '*', 'event', '{"type":"ended","state":"CANCELLED","at":' .. now .. '}')
  for _, key in ipairs(KEYS) do
    redis.call('EXPIRE', key, ARGV[2])
  end
end
return state
