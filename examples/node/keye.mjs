// Jobs from Node: `submit`, then `events` or `outcome`. `redis` is a client of the npm package `redis`, or whatever else
// has its `sendCommand`. Who waits blocks a connection: give `events` and `outcome` one of their own (`redis.duplicate()`).
import { randomUUID } from "node:crypto";

// As the workers have it.
const prefix = process.env.KEYE_KEY_PREFIX ?? "";
const record = (id) => `${prefix}keye:job:${id}`;

// Resolves to the job's id. `job` is as in docs/schemas/job.json; what is wrong with it is told by its outcome.
export async function submit(redis, job) {
  const id = randomUUID();
  const submittedAt = Date.now() / 1000;
  const schemaVersion = job.traceparent || job.result_ttl_seconds ? 2 : 1;
  const sealed = { schema_version: schemaVersion, job_id: id, submitted_at: submittedAt, job };
  const priority = job.priority ?? "normal";
  await redis.sendCommand([
    "HSET", record(id),
    "state", "QUEUED",
    "sealed", JSON.stringify(sealed),
    "priority", priority,
    "submitted_at", String(submittedAt),
    "deadline_at", job.deadline_seconds ? String(submittedAt + job.deadline_seconds) : "",
    "attempts", "0",
    "max_attempts", String(job.max_attempts ?? 3),
  ]);

  const step = { high: 0, normal: 3, low: 6 }[priority];
  const message = {
    body: Buffer.from(JSON.stringify([[], { sealed }, {}])).toString("base64"),
    "content-type": "application/json",
    "content-encoding": "utf-8",
    headers: { task: "keye.analyze", id, lang: "js", keye_recorded: true },
    properties: {
      correlation_id: id,
      delivery_tag: randomUUID(),
      delivery_mode: 2,
      delivery_info: { exchange: "", routing_key: "keye.jobs" },
      priority: step,
      body_encoding: "base64",
    },
  };
  const queue = prefix + (step === 0 ? "keye.jobs" : `keye.jobs\x06\x16${step}`);
  await redis.sendCommand(["LPUSH", queue, JSON.stringify(message)]);
  return id;
}

// What the worker says of the job, from its start until it ends, as in docs/schemas/event.json, each with the `id` to go
// on after. Where an event has a higher `attempt`, drop the text of those before it.
export async function* events(redis, id, after = "0-0") {
  let attempt = 0;
  let isLast = false;
  for (;;) {
    const wait = isLast ? [] : ["BLOCK", "2000"];
    const streams = await redis.sendCommand(["XREAD", ...wait, "STREAMS", `${record(id)}:events`, after]);
    // Pairs by RESP2, a map by RESP3, which redis 6 speaks by itself.
    const entries = !streams ? [] : Array.isArray(streams) ? streams[0][1] : Object.values(streams)[0];
    for (const [entry, [, json]] of entries) {
      after = entry;
      const event = JSON.parse(json);
      // Of a worker that does not know yet that it lost the job.
      if (event.attempt < attempt) continue;
      attempt = event.attempt ?? attempt;
      yield { id: entry, ...event };
      if (event.type === "ended") return;
    }
    if (entries.length) continue;
    if (isLast) return;
    const state = await redis.sendCommand(["HGET", record(id), "state"]);
    if (!state) throw new Error(`There is no job ${id}: it was never sent, or its outcome has expired.`);
    // Ended after the read: its last events are there by now.
    isLast = state !== "QUEUED" && state !== "RUNNING";
  }
}

// Waits for the end; as in docs/schemas/outcome.json: `kind` is "result", with an `answer`, or "failure", with a `code`.
export async function outcome(redis, id) {
  for await (const _ of events(redis, id));
  return JSON.parse(await redis.sendCommand(["HGET", record(id), "outcome"]));
}
