// node main.mjs HOST:PORT [WORKER_ID]: runs the agent below. The token, where one is asked for, is in LIGHTNING_TOKEN.

import { setTimeout as sleep } from 'node:timers/promises';
import { Runner } from './runner.mjs';
import { Store } from './store.mjs';

/** The agent: squares a number, slowly if the task says so, with what the prompt in the resources adds. */
async function agent(task, { tracer, resources, signal }) {
  if (task.fail) throw new Error(task.fail);
  return await tracer.span('square', { n: BigInt(task.n), language: 'node' }, async (parent) => {
    await tracer.span('think', { prompt: resources.prompt?.template ?? '' }, () => {}, parent);
    await sleep(task.seconds ? task.seconds * 1000 : 0, undefined, { signal });
    return task.n * task.n;
  });
}

const [address = '127.0.0.1:4747', workerId] = process.argv.slice(2);
const store = new Store(address, { token: process.env.LIGHTNING_TOKEN });
const runner = new Runner(store, agent, { workerId, heartbeatMs: 1000, log: console.log });
process.on('SIGTERM', () => runner.drain());
process.on('SIGINT', () => runner.stop());
await runner.run();
store.close();
console.log('drained');
