// Ask about an image or a video and print the answer while it is written: `node ask.mjs QUESTION [URI]`.
// `npm install` first; KEYE_REDIS_URL where Redis is not on this machine.
import { createClient } from "redis";
import { events, outcome, submit } from "./keye.mjs";

const [question, uri] = process.argv.slice(2);
if (!question) {
  console.error("usage: node ask.mjs QUESTION [URI]");
  process.exit(2);
}
const type = /\.(mp4|mov|webm|mkv|avi)$/i.test(uri) ? "video" : "image";
const redis = await createClient({ url: process.env.KEYE_REDIS_URL ?? "redis://127.0.0.1:6379/0" }).connect();
try {
  const id = await submit(redis, { prompt: question, media: uri ? [{ type, uri }] : [] });
  console.error(`job ${id}`);
  for await (const event of events(redis, id)) {
    // Of a job that is queued again, `reason` says why; the next attempt writes its text anew.
    if (event.type === "stage") console.error(`[${event.reason ?? event.stage}, attempt ${event.attempt}]`);
    if (event.type === "text" && event.channel === "answer") process.stdout.write(event.text);
  }
  console.log();
  const ended = await outcome(redis, id);
  if (ended.kind === "failure") {
    console.error(`${ended.code}: ${ended.message}`);
    process.exitCode = 1;
  }
} finally {
  redis.destroy();
}
