// Appends one event to a new stream at a time, from as many loops as asked for, and prints appends per second.
// usage: node append.mjs CONNECTION WAITING SECONDS
import { getPostgreSQLEventStore } from '@event-driven-io/emmett-postgresql';
import { randomUUID } from 'node:crypto';

const [connection, waiting, seconds] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const store = getPostgreSQLEventStore(connection);
const data = {
  title: 'Deploy failed', description: 'Health checks failing post-deploy',
  severity: 'degraded', visibility: 'public', service_ids: [42],
};
const once = () => store.appendToStream(`incident-${randomUUID()}`, [{ type: 'incident.opened', data }]);

for (let i = 0; i < 200; i++) await once();
const began = performance.now();
const end = began + seconds * 1000;
let done = 0;
await Promise.all(Array.from({ length: waiting }, async () => {
  while (performance.now() < end) { await once(); done += 1; }
}));
console.log(JSON.stringify({ rate: done / ((performance.now() - began) / 1000) }));
await store.close();
