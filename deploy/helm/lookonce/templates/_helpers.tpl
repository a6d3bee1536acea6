{{- define "lookonce.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "lookonce.labels" -}}
app.kubernetes.io/name: lookonce
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lookonce.meta" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "lookonce.image" -}}
{{- $tag := .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end }}lookonce-{{ .part }}{{ if eq .engine "vllm" }}-vllm{{ end }}:{{ $tag }}{{ if and (eq .variant "cuda") (ne .engine "vllm") }}-cuda{{ end }}
{{- end }}

{{- define "lookonce.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "lookonce.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "lookonce.storeUrl" -}}
{{- if eq .Values.store.kind "valkey" -}}
{{- $auth := or .Values.store.valkey.password .Values.store.valkey.existingSecret -}}
redis://{{ if $auth }}:$(STORE_PASSWORD)@{{ end }}{{ include "lookonce.name" . }}-store:6379
{{- else -}}
{{- required "store.external.url is required with store.kind external" .Values.store.external.url | replace "PASSWORD" "$(STORE_PASSWORD)" -}}
{{- end -}}
{{- end }}

{{- define "lookonce.storeSecret" -}}
{{- if eq .Values.store.kind "valkey" -}}
{{- if .Values.store.valkey.existingSecret }}{{ .Values.store.valkey.existingSecret }}{{ else if .Values.store.valkey.password }}{{ include "lookonce.name" . }}-store{{ end -}}
{{- else }}{{ .Values.store.external.existingSecret }}{{ end -}}
{{- end }}

{{- define "lookonce.storeEnv" -}}
{{- with include "lookonce.storeSecret" .root }}
- name: STORE_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: password}}
{{- end }}
- name: {{ .prefix }}STORE
  value: {{ include "lookonce.storeUrl" .root | quote }}
{{- with .root.Values.tracing.endpoint }}
- name: {{ $.prefix }}TRACE_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "lookonce.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "lookonce.placing" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lookonce.addresses" -}}
dns://{{ include "lookonce.name" .root }}-{{ .model }}-{{ .part }}:{{ .port }}
{{- end }}

{{- define "lookonce.pods" -}}
podSelector:
  matchLabels:
    {{- include "lookonce.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .part }}
    {{- with .model }}
    lookonce.dev/model: {{ . }}
    {{- end }}
{{- end }}
{{- define "lookonce.toStore" -}}
{{- if eq .Values.store.kind "valkey" }}
- to:
    - {{- include "lookonce.pods" (dict "root" . "part" "store" "model" "") | nindent 6 }}
  ports: [{port: 6379, protocol: TCP}]
{{- else }}
- to: [{ipBlock: {cidr: {{ .Values.store.external.cidr | quote }}}}]
  ports: [{port: {{ .Values.store.external.port }}, protocol: TCP}]
{{- end }}
{{- if .Values.tracing.endpoint }}
- ports: [{port: 4317, protocol: TCP}]
{{- end }}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}

{{- define "lookonce.tlsSecret" -}}
{{- if .root.Values.tls.certManager.issuer -}}
{{ include "lookonce.name" .root }}{{ with .model }}-{{ . }}{{ end }}-{{ .part }}-tls
{{- else -}}
{{ required (printf "tls.secrets.%s or tls.certManager.issuer is required with tls.enabled" .part) (index .root.Values.tls.secrets .part) }}
{{- end -}}
{{- end }}

{{- define "lookonce.tlsVolume" -}}
- name: tls
  secret: {secretName: {{ include "lookonce.tlsSecret" . | quote }}, defaultMode: 0440}
{{- end }}

{{- define "lookonce.rpcProbe" -}}
{{- if .root.Values.tls.enabled -}}
# The kubelet's own gRPC probe speaks no TLS.
exec:
  command:
    - python
    - -m
    - lookonce.cli.health
    - 127.0.0.1:{{ .port }}
    - --tls-ca=/etc/lookonce-tls/ca.crt
    - --tls-name={{ .name }}
    {{- if .root.Values.tls.mutual }}
    - --tls-certificate=/etc/lookonce-tls/tls.crt
    - --tls-key=/etc/lookonce-tls/tls.key
    {{- end }}
timeoutSeconds: 10
periodSeconds: 10
{{- else -}}
grpc: {port: {{ .port }}}
periodSeconds: 5
{{- end }}
{{- end }}
