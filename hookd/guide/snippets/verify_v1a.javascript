import { createPublicKey, verify } from "node:crypto"

export function verifyV1a(publicKey, headers, body /* a Buffer, as it came */) {
  const raw = Buffer.from(publicKey.replace("whpk_", ""), "base64")
  const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), raw])
  const key = createPublicKey({ key: spki, format: "der", type: "spki" })
  const signed = Buffer.concat([Buffer.from(`${headers["webhook-id"]}.${headers["webhook-timestamp"]}.`), body])
  const fresh = Math.abs(Date.now() / 1000 - Number(headers["webhook-timestamp"])) < 300
  return fresh && headers["webhook-signature"].split(" ").some(s =>
    s.startsWith("v1a,") && verify(null, signed, key, Buffer.from(s.slice(4), "base64")))
}
