import { Webhook } from "standardwebhooks"

const event = new Webhook("whsec_…").verify(body, headers)  // throws when something is wrong; body as it came
