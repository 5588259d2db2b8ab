// A worker: waits for a key, works while it holds the lease, and gives it back.
//
// node worker.mjs KEY [--seconds N] [--endpoint HOST:PORT] [--ttl SECONDS] [--wait SECONDS]
//
// Exits with 0 when the work is done or was interrupted, 69 if no daemon answers, 73 if the lease was lost, and 75 if
// another holds the key.

import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { connect, Held, Lease, Lost } from './leased-lease.mjs';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seconds: { type: 'string', default: '15' }, // how long the work takes
    endpoint: { type: 'string', default: '127.0.0.1:5327' }, // of the daemon
    ttl: { type: 'string', default: '10' }, // of the lease, in seconds
    wait: { type: 'string', default: '60' }, // in line at most, in seconds
  },
});
if (positionals.length !== 1) {
  console.error('usage: node worker.mjs KEY [--seconds N] [--endpoint HOST:PORT] [--ttl SECONDS] [--wait SECONDS]');
  process.exit(2);
}

const client = connect(values.endpoint);
const lease = new Lease(client, positionals[0], {
  owner: `worker.mjs:${process.pid}`,
  ttl: 1_000 * values.ttl,
  wait: 1_000 * values.wait,
});

let interrupted = false;
for (const name of ['SIGINT', 'SIGTERM']) {
  process.once(name, () => {
    interrupted = true;
    lease.close();
  });
}

process.exitCode = await run();
client.close();

async function run() {
  let code = 0;
  try {
    const token = await lease.acquire();
    console.log(`holding ${lease.key} with fencing token ${token}`);
    // The work. It sends the token with every write, and stops when the lease is lost.
    await sleep(1_000 * values.seconds, undefined, { signal: lease.lost }).catch(() => lease.lost.throwIfAborted());
  } catch (error) {
    if (error instanceof Held) {
      console.log(`not granted: ${error.message}`);
      return 75;
    }
    if (!(error instanceof Lost)) {
      console.log(`failed: ${error.details ?? error}`);
      code = 69;
    } else if (!interrupted) {
      console.log(`lost: ${error.message}`);
      code = 73;
    }
  }
  if (await lease.release()) console.log('released');
  return code;
}
