// graphile-worker with undici: local queue and batched completion on, as its own benchmark has them.

import { createHmac, randomUUID } from "node:crypto";
import { makeWorkerUtils, run } from "graphile-worker";
import { Agent, setGlobalDispatcher, request } from "undici";

const [, , doing, connectionString, rest] = process.argv;
const given = JSON.parse(rest);
const SECRET = Buffer.from("0123456789abcdef0123456789abcdef");

if (doing === "fill") {
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  const fill = "x".repeat(Math.max(0, given.payload - 32));
  for (let start = 0; start < given.count; start += 2000) {
    const specs = [];
    for (let n = start; n < Math.min(given.count, start + 2000); n++) {
      const data = `{"n": "${String(n).padStart(7, "0")}", "fill": "${fill}"}`;
      specs.push({
        identifier: "post",
        payload: {
          url: given.urls[n % given.urls.length],
          id: randomUUID(),
          body: `{"type":"bench.made","timestamp":"2026-11-23T20:15:00.000Z","data":${data}}`,
        },
      });
    }
    await utils.addJobs(specs);
  }
  await utils.release();
} else {
  setGlobalDispatcher(new Agent({ connections: given.concurrency, pipelining: 1, keepAliveTimeout: 60_000 }));
  const runner = await run({
    connectionString,
    maxPoolSize: 20,
    taskList: {
      post: async ({ url, id, body }) => {
        const timestamp = String(Math.floor(Date.now() / 1000));
        const signature = createHmac("sha256", SECRET).update(`${id}.${timestamp}.${body}`).digest("base64");
        const answer = await request(url, {
          method: "POST",
          headers: {
            "content-type": "application/json",
            "user-agent": "peer",
            "webhook-id": id,
            "webhook-timestamp": timestamp,
            "webhook-signature": `v1,${signature}`,
          },
          body,
        });
        await answer.body.dump();
        if (answer.statusCode !== 200) throw new Error(`the receiver answered ${answer.statusCode}`);
      },
    },
    preset: {
      worker: {
        concurrentJobs: given.concurrency,
        localQueue: { size: given.concurrency },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
  });
  await runner.promise;
}
