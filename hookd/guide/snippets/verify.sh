# usage: sh verify.sh SECRET WEBHOOK-ID WEBHOOK-TIMESTAMP WEBHOOK-SIGNATURE < body
key=$(printf %s "${1#whsec_}" | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
expected=v1,$({ printf '%s.%s.' "$2" "$3"; cat; } | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | openssl base64 -A)
age=$(($(date +%s) - $3))
case " $4 " in
  *" $expected "*) test "${age#-}" -lt 300 && echo right || { echo "right, but $age s old"; exit 1; } ;;
  *) echo wrong; exit 1 ;;
esac
