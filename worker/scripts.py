"""Each change of a job's state as one Lua script: it happens whole or not at all, and may be sent twice.

A connection that breaks before the reply arrives is tried again with the same token. Fields of the job's hash
that only these scripts use: `holder`, token of the last claim; `alone`, 1 if that claim ran without company;
`suspect`, 1 once a worker died of it or beside it; `exhausted`, 1 once it was given up; `told`, number of the
last batch of events.
"""

from __future__ import annotations

from worker.contract import EVENTS_MAXLEN

_TELL = f"""
local function tell(stream, name, data)
  redis.call('XADD', stream, 'MAXLEN', '~', {EVENTS_MAXLEN}, '*', 'event', name, 'data', data)
end
"""
_BEGIN = (
    _TELL
    + """
local function observe(key, token)
  redis.call('HSETNX', key, 'observed_by', token)
  return redis.call('HGET', key, 'observed_by') == token and 1 or 0
end
local state = redis.call('HGET', KEYS[1], 'state')
local open = state == 'queued' or state == 'running'
"""
)

# KEYS: job, lease, events, open jobs. ARGV: token, now, job id, lease in ms, most attempts, alone, payload,
# channel, event. Returns the job's state or what stands in the way, attempts, first to observe.
#
# A job that runs without a lease has lost its worker. It then runs alone, and only a death alone counts:
# the attempt that ended in company keeps its number.
CLAIM = (
    _BEGIN
    + """
if not state then return {'missing', 0, 0} end
local function field(name) return redis.call('HGET', KEYS[1], name) end
local attempts = tonumber(field('attempts') or '0')
if not open then return {state, attempts, observe(KEYS[1], ARGV[1])} end
local holder = redis.call('GET', KEYS[2])
if holder == ARGV[1] then return {field('exhausted') and 'exhausted' or 'running', attempts, 0} end
if holder then return {'leased', attempts, 0} end
local died, died_alone = state == 'running', state == 'running' and field('alone') == '1'
redis.call('ZADD', KEYS[4], ARGV[2], ARGV[3])
if died then redis.call('HSET', KEYS[1], 'suspect', 1) end
if ARGV[6] == '0' and field('suspect') then return {'suspect', attempts, 0} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[4])
if died_alone and attempts >= tonumber(ARGV[5]) then
  redis.call('HSET', KEYS[1], 'exhausted', 1, 'holder', ARGV[1])
  return {'exhausted', attempts, 0}
end
if not died or died_alone then attempts = attempts + 1 end
redis.call('HSET', KEYS[1], 'state', 'running', 'started_at', ARGV[2], 'attempts', attempts,
  'holder', ARGV[1], 'alone', ARGV[6], 'payload', ARGV[7], 'told', 0)
tell(KEYS[3], 'started', '{"attempt":' .. attempts .. '}')
local ttl = redis.call('TTL', KEYS[1])
if ttl > 0 then redis.call('EXPIRE', KEYS[3], ttl) end
redis.call('PUBLISH', ARGV[8], ARGV[9])
return {'running', attempts, 0}
"""
)

# KEYS: job, lease, events, open jobs, dead letters, jobs drained. ARGV: token, now, job id, state, field,
# value, ttl in s, name and data of the end's event, dead letter or nothing, channel, event, ttl of the count
# in s.
# Returns the job's state, first to observe.
FINISH = (
    _BEGIN
    + """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
redis.call('ZREM', KEYS[4], ARGV[3])
if not state then return {'missing', 0} end
if open then
  state = ARGV[4]
  redis.call('HSET', KEYS[1], 'state', state, 'finished_at', ARGV[2], ARGV[5], ARGV[6])
  redis.call('HDEL', KEYS[1], 'payload')
  redis.call('EXPIRE', KEYS[1], ARGV[7])
  tell(KEYS[3], ARGV[8], ARGV[9])
  redis.call('EXPIRE', KEYS[3], ARGV[7])
  if ARGV[10] ~= '' then redis.call('XADD', KEYS[5], 'MAXLEN', '~', 10000, '*', 'job', ARGV[10]) end
  redis.call('INCR', KEYS[6])
  redis.call('EXPIRE', KEYS[6], ARGV[13])
  redis.call('PUBLISH', ARGV[11], ARGV[12])
end
return {state, observe(KEYS[1], ARGV[1])}
"""
)

# KEYS: job, lease, events, open jobs. ARGV: token, now, job id, channel, event.
# Returns 1 if the job waits in the queue's place again, as if this attempt had never been.
GIVE_BACK = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'running' then
  redis.call('HSET', KEYS[1], 'state', 'queued')
  redis.call('HINCRBY', KEYS[1], 'attempts', -1)
  redis.call('ZADD', KEYS[4], ARGV[2], ARGV[3])
  redis.call('PUBLISH', ARGV[4], ARGV[5])
end
return (state == 'running' or state == 'queued') and 1 or 0
"""

# KEYS: job, lease, events, open jobs. ARGV: token, now, job id, lease in ms. Returns the job's state, 'lost'
# where another worker has it. A lease that ran out while the broker was away is taken again.
RENEW = """
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' then return state or 'missing' end
if (redis.call('GET', KEYS[2]) or redis.call('HGET', KEYS[1], 'holder')) ~= ARGV[1] then return 'lost' end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[4])
redis.call('ZADD', KEYS[4], ARGV[2], ARGV[3])
return state
"""

# KEYS: job, events. ARGV: token, number of the batch, channel, `JobEvent`, then name and data of each event.
# Whoever lost the job, or comes after its end, says nothing any more.
TELL = (
    _TELL
    + """
local job = redis.call('HMGET', KEYS[1], 'state', 'holder', 'told')
if job[1] ~= 'running' or job[2] ~= ARGV[1] or tonumber(job[3]) >= tonumber(ARGV[2]) then return end
redis.call('HSET', KEYS[1], 'told', ARGV[2])
for i = 5, #ARGV, 2 do tell(KEYS[2], ARGV[i], ARGV[i + 1]) end
redis.call('PUBLISH', ARGV[3], ARGV[4])
"""
)

# KEYS: media. ARGV: width, height, frames. Media that nobody keeps any more stay forgotten.
DESCRIBE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return end
redis.call('HSET', KEYS[1], 'width', ARGV[1], 'height', ARGV[2], 'frames', ARGV[3])
"""

# KEYS: open jobs. ARGV: what the leases of a dead worker begin with, prefix of a job's key. Returns how many
# jobs it held.
#
# They are free at once, and what runs without a lease is put where the next sweep looks first: the dead
# worker may have had it in hand, waiting for its turn alone. If another has it, it is sent once too often.
FREE = """
local held = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local key = ARGV[2] .. id
  local lease = redis.call('GET', key .. ':lease')
  if lease and string.sub(lease, 1, #ARGV[1]) == ARGV[1] then
    redis.call('DEL', key .. ':lease')
    held = held + 1
    lease = false
  end
  if not lease and redis.call('HGET', key, 'state') == 'running' then redis.call('ZADD', KEYS[1], 0, id) end
end
return held
"""

# KEYS: open jobs, queue. ARGV: now, before when a job was last in hand, most jobs, slack in s, prefix of a
# job's key. Returns id and payload of each job that has to be sent again, one after the other.
#
# A job that nobody has in hand and that has no lease has lost its worker if it runs, and its message if it is
# queued: unless the message still waits, which it does if the queue's next one is no younger. One that has a
# lease is looked at again when that runs out.
SWEEP = """
local head = redis.call('LINDEX', KEYS[2], -1)
local next_at = math.huge
if head then
  next_at = tonumber(redis.call('HGET', ARGV[5] .. cjson.decode(head).headers.id, 'created_at') or '0')
end
local lost = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])) do
  local key = ARGV[5] .. id
  local job = redis.call('HMGET', key, 'state', 'payload', 'created_at')
  if (job[1] ~= 'queued' and job[1] ~= 'running') or not job[2] then
    redis.call('ZREM', KEYS[1], id)
  else
    local lease_s = math.max(0, redis.call('PTTL', key .. ':lease')) / 1000
    redis.call('ZADD', KEYS[1], lease_s > 0 and ARGV[2] + lease_s or ARGV[1], id)
    local waits = job[1] == 'queued' and tonumber(job[3]) + ARGV[4] >= next_at
    if not waits and lease_s == 0 then
      lost[#lost + 1] = id
      lost[#lost + 1] = job[2]
    end
  end
end
return lost
"""
