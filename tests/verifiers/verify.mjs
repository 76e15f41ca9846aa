// Reads requests and keys, a JSON object a line, and prints which verifiers accept each.
// With "installed" as its argument the libraries are asked too, without it only node's own crypto.
import { createHmac, createPublicKey, timingSafeEqual, verify } from "node:crypto"
import { createInterface } from "node:readline"

const verifiers = { "node:crypto": byHand }
if (process.argv[2] === "installed") {
  const { Webhook: Standard } = await import("standardwebhooks")
  const { Webhook: Svix } = await import("svix")
  verifiers["npm standardwebhooks"] = library(Standard)
  verifiers["npm svix"] = library(Svix)
}

function library(Webhook) {
  return (key, headers, body) => {
    new Webhook(key).verify(body.toString("utf8"), headers)
    return true
  }
}

function byHand(key, headers, body) {
  const [form, encoded] = [key.slice(0, 6), Buffer.from(key.slice(key.indexOf("_") + 1), "base64")]
  const signed = Buffer.concat([Buffer.from(`${headers["webhook-id"]}.${headers["webhook-timestamp"]}.`), body])
  const entries = headers["webhook-signature"].split(" ").map(entry => entry.split(","))
  if (form === "whsec_") {
    const expected = createHmac("sha256", encoded).update(signed).digest()
    return entries.some(([scheme, text]) => {
      const given = Buffer.from(text, "base64")
      return scheme === "v1" && given.length === expected.length && timingSafeEqual(given, expected)
    })
  }
  const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), encoded])
  const publicKey = createPublicKey({ key: spki, format: "der", type: "spki" })
  return entries.some(([scheme, text]) => scheme === "v1a" && verify(null, signed, publicKey, Buffer.from(text, "base64")))
}

for await (const line of createInterface({ input: process.stdin })) {
  const { key, headers, body } = JSON.parse(line)
  const accepted = []
  for (const [name, accepts] of Object.entries(verifiers)) {
    if (key.startsWith("whpk_") && accepts !== byHand) continue // no library knows v1a
    try {
      if (accepts(key, headers, Buffer.from(body, "base64"))) accepted.push(name)
    } catch {
      // refused
    }
  }
  console.log(JSON.stringify(accepted))
}
