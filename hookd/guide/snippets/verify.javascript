import { createHmac, timingSafeEqual } from "node:crypto"

export function verify(secret, headers, body /* a Buffer, as it came */) {
  const key = Buffer.from(secret.replace("whsec_", ""), "base64")
  const head = `${headers["webhook-id"]}.${headers["webhook-timestamp"]}.`
  const expected = createHmac("sha256", key).update(head).update(body).digest()
  const fresh = Math.abs(Date.now() / 1000 - Number(headers["webhook-timestamp"])) < 300
  return fresh && headers["webhook-signature"].split(" ").some(s => {
    const given = Buffer.from(s.replace("v1,", ""), "base64")
    return given.length === expected.length && timingSafeEqual(given, expected)
  })
}
